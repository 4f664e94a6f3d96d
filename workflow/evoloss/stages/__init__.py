"""What each compute rule does: from files and its own configuration sections to a result. Scripts call these."""
