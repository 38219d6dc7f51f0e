"""What spreads a plain model over ranks, from outside: transports of rows, and the exchange of tokens over them."""
