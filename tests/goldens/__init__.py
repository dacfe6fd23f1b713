"""What today's bigtrain gives, kept in files: what a change of its shape must not change.

`python -m tests.goldens` (`make goldens`) writes the numbers anew; test_goldens.py holds the code to them.

- texts/: made-up examples for every task, and a tokenizer. Never written anew.
- trained/, exports/: runs with a checkpoint, and exports. Never written anew, for later code must read what earlier
  code wrote; `python -m tests.goldens runs` makes those that are not there.
- numbers/: what is compared.
"""
