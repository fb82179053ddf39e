"""All contact with transformers' internals; nothing outside this package knows how transformers is made inside.

`sites` finds attention layers, `interface` is the attention function they call, `rotary` edits frequency tables,
`inputs` finds the BOS and acts on the embedding, `record` keeps the description in the model's config.
"""
