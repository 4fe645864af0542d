"""Run folders side by side: statistics, the comparison page, the terminal table, the W&B workspace.

`compare.compare` reads the folders that `runs.select` found and returns the one plain object (`compare.json`) that
everything else draws: `page.render` the page, `compare.show` the terminal, `workspace.save` W&B. Nothing here imports
torch, pandas or pyarrow: a small comparison takes two seconds.
"""
