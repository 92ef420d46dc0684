"""From documents to tokenised rows, and from a folder of rows to the train loop.

`command` is `easyctx data`; `build` is what it runs, in four steps: `readers` give records, `reading` turns them into
tokens in a `store` on disk, `plan` says which documents are written, how often and in what order, `rows` writes them.
`card` describes the result. `load` and `packed` are for the train loop.
"""
