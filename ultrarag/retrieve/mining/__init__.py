"""Mining of hard negatives: `ultrarag.retrieve.mine` for rows in memory, `ultrarag data mine` for files."""
