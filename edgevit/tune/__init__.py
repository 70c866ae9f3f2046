"""Tune: a search over recipes and their strengths with the boards in the loop, under limits a person states.

``limits`` says what is asked; ``space`` what is searched, and what a draw means as a recipe; ``trials`` keeps every draw on
disk and asks Optuna for the next; ``host`` builds a candidate and counts what its file gets right; ``latency`` learns how long
candidates take on each target; ``figures`` reads what was measured; ``search`` goes through all of it; ``answer`` is what comes
of it. ``edgevit.cli.tune`` is the command.
"""
