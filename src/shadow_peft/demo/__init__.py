"""The demo: a base that the project pretrained itself, a task that it writes itself, and an honest race on both.

    robot_phrases, robot_commands    the task
    embedded                         base, tokenizer and pretrained shadow
    race, measure                    base + shadow and LoRA, trained side by side, each in a process of its own
    scoring                          exact match, fields, loss
    report                           table, picture, files

`cli/demo.py` runs them in this order.
"""
