"""Models by name: the catalog, the hub, the user's cache."""
