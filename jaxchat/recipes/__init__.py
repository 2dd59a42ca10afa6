"""mergekit recipes -> assemblies and layer plans."""
