"""The independent signs that pushed weights arrived, and the conclusion from them."""
