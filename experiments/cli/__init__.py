"""The command line: its words are checked, then a run or a study is made and shown."""
