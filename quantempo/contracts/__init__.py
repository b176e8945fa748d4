"""The types that all parts of quantempo share: frozen data, standard library and numpy only."""
