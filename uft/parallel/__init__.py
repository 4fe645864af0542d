"""Several processes that train one model: who they are, what they tell each other, how rows are shared among them."""
