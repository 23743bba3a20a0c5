"""Sessions and samplers: one process with one base, and the operations of everyone whose work shares it."""
