"""What a modification costs: one attention call, against stock attention on the same inputs in the same run.

`subjects` says what is measured and its floor, `clock` how a pair is timed, `survey` goes through the shapes and
`tables` writes down what was found.
"""
