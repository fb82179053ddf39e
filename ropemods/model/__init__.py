"""All contact with transformers' internals; nothing outside this package knows how transformers is made inside.

`anatomy` looks at a model once, `attention_layers` finds the layers, `attention_function` is what they call,
`model_inputs` and `bos` find the BOS, `config_record` keeps the description in the model's config.
"""
