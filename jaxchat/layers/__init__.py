"""The halves that decoder blocks are made of, one file a kind; `jaxchat/model.py` composes them."""
