"""The language-model library: what the stages are made of.

Modules stand on floors and import only downwards (tests/test_house.py holds them to it):

    stages                                      paths, params.yaml, metrics files
    train   evaluate   generate                 joins: data meets model
    checkpoint                                  training state and models as files
    model  optim  schedule  device  |  text  tokenizer  tokens  baselines
            (torch, no files)       |        (bytes, no torch)
    errors  config  rng  files  history  console
"""
