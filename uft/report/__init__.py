"""Run folders side by side: statistics, the comparison page, the terminal table, the W&B workspace.

`build.compare` reads the folders and returns the one plain object (`compare.json`) that everything else draws:
`page.render` the page, `table.show` the terminal, `workspace` W&B. Nothing here imports torch.
"""
