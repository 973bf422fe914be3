"""What a run leaves for others: a `directory` with weights, tokenizer, template and a model `card`."""
