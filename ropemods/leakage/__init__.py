"""How much a model's attention tells about absolute position: what is measured, and how well."""
