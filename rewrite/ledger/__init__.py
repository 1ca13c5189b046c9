"""What is wrong in a checkpoint, whoever loads it: every tensor in its role, every scale a number that can be meant.

Found once, by :func:`rewrite.ledger.ledger.faults`. ``inspect`` lists it, ``convert`` refuses by its code, facts about
engines say what comes of it.
"""
