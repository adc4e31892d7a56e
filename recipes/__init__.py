"""The recipes that ship with dpkd: `dpkd recipes` lists them, `dpkd run NAME` runs one."""
