"""The command line: one module a command, with add(parser) for its options and run(args) for what it does."""
