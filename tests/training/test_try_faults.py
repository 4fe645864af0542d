def test_x(build):
    import torch
    for o in ["sft","ift","uft","una","dft","dft2","dpo"]:
        p = build(o, run=o)
        print(o, p.trainer.steps, p.plan, float(torch.rand(())))
        p.trainer.fit()
def test_rng(build):
    import torch
    for m in ("cached","cached","copy"):
        p = build("dpo", f"reference.mode={m}", run=m)
        print(m, float(torch.rand(())))
    for m in ("cached","cached","copy", "adapter_off"):
        p = build("dpo", f"reference.mode={m}", "model.adapter=lora", "model.lora.dropout=.1", run="l"+m)
        print(m, float(torch.rand(())))
