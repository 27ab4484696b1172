"""The command `hf_alibi`: one file for each sub-command."""
