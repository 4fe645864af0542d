"""From a composed configuration to processes that carry it out: one process tree per run, results by file."""
