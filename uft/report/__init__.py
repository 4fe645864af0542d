"""Run folders side by side: statistics, the comparison page, the terminal table, the W&B workspace.

`compare.compare` reads the folders that `runs.select` found and returns the one plain object (`compare.json`) that
everything else draws: `page.render` the page, `table.show` the terminal, `workspace.save` W&B. Nothing here imports
torch; pandas and scipy.stats are imported where they are used, and a small comparison takes two seconds.
"""
