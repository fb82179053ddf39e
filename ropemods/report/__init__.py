"""What a measurement found, as records, and how it is shown: words, Markdown, HTML. Imports nothing that measures."""
