"""Built-in adapters: plugins like any third party's, reached only through the registry."""
