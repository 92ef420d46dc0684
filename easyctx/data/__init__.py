"""From text to tokenised rows, and from a folder of rows to the train loop.

`command` is `easyctx data`; `build` is what it runs; `load` is for the train loop.
"""
