"""Settings of mining, under the name that scripts know: `ultrarag.retrieve.mining.settings`."""
