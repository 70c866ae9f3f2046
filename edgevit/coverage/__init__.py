"""Which families of Vision Transformers can be exported: every one that timm has, its smallest member, in every format.

``families`` says which, ``weights`` what stands in for training, ``cells`` does one family in one format, ``run`` all of them.
"""
