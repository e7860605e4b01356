"""Files written all or none, and the hub; knows nothing of adapters."""
