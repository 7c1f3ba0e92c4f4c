//! krakectl, the command line of the federation, and its typed client.
