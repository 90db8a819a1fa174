"""Chains of thought from a teacher, checked and paid for once. Read in this order:

prompts    every word that is sent to a model
checks     what an answer must pass: format, leaks, refusals, the validator's verdict
ledger     the append-only files that survive kill -9
limits     how fast requests may leave
client     one request: budget, retries, redaction, and what comes back
teachers   the three teachers, the validators, and the dialogue between them
"""
