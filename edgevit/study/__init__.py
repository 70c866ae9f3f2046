"""Studies: a grid of recipes × models × formats × targets, built in parallel processes and measured on the targets.

``file`` reads a study file; ``plan`` decides which cells can apply before any work starts; ``grid`` builds them in processes
of their own; ``measured`` finds what the results store has already; ``rows`` relates the figures; ``edgevit.cli.study`` is
the command that goes through all of it.
"""
