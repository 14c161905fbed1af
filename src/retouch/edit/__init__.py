"""Edit facts inside a model's weights.

A language model stores much of what it knows in the MLPs of its middle blocks: at a subject's last token the inputs of
``mlp.down`` act as a key, and what it writes back is the value that later tokens read. An edit finds a better value by
gradient and writes it at that key, as a change of low rank; its neighbours are what such a write may hurt.

    facts.py      a Fact, and loaders of the published formats
    base.py       what every method is; contexts.py, value.py, spread.py: the steps that methods share
    rome.py ...   one file a method (``retouch methods edit``)
    evaluate.py   what an edit did; harm.py: the certificate; bench.py: all methods in one harness
    api.py        plan, edit_facts; demo.py: the tour
"""
