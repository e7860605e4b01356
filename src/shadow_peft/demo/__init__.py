"""The demo: an embedded base and an embedded task, on which a shadow and LoRA are trained and compared.

    robot_phrases, robot_commands    the task
    embedded                         base, tokenizer and pretrained shadow
    race, measure                    base + shadow and LoRA, trained at the same time, each in a process of its own
    scoring                          exact match, fields, loss
    report                           table, plot, files

`cli/demo.py` runs them in this order.
"""
