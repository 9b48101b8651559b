"""What the tests of the whole suite share: real processes, traffic like that of clients, and a judge of what must hold."""
