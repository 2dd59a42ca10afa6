"""The commands of `jaxchat CMD`: one file each, whose `COMMAND` says its flags and what it does with them.

A new command is such a file and a row here.
"""

COMMANDS = {
    "chat": "Chat with a model, line by line",
    "generate": "Continue one prompt, as text or as JSON",
    "models": "List the models that were fetched from the Hugging Face Hub, and remove some",
    "sessions": "List the conversations that were saved under a name, and remove some",
    "show": "Print a model's shapes, layers, parameters and memory under a layer plan",
    "plan": "Convert layer plans between notations, and say what one costs",
    "analyze": "Measure what each layer of a model does",
    "evaluate": "Score a model on tasks, with intervals, against another run",
    "search": "Search for the layer plan that is best for a text or a task, and validate it",
    "train": "Train adapters, new layers or whole models on conversations or texts",
    "batch": "Answer every line of a file, and write the answers to another",
    "convert": "Convert model directories, and write layer plans and recipes as models of their own",
}
"""What each is for, by its name. None is imported until it runs: `--help` is to be fast."""
