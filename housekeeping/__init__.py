"""What every training program has, and dql.py need not show: none of it knows what is trained.

    arguments.py    the command line, args.json, and what a resumed run may change
    ending.py       signals, streams that break, and errors as one line
    folder.py       files written whole, and the lock on a run's folder
    machine.py      devices, memory, versions
    checkpoint.py   how far a run has come, read back and checked
    report.py       which scores are reported, and the text that ends a run
    curves.py       metrics.csv, curve.png
    command.py      the command dql
    run.py          a run while it trains: all of these together
    acting.py       a trained policy as a function, as a film, and as a file for other programs
    evaluating.py   --evaluate: a run's policies evaluated anew
"""
