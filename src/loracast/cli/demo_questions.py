"""What `loracast demo` asks of examples/manual.pdf, and what the manual says."""

QUESTIONS = (
    ("How long does the warranty of the Quillmere D-27 last?", "30 months"),
    ("Who designed the Quillmere D-27?", "Ingrid Solvang"),
    ("How much does the water tank of the Quillmere D-27 hold?", "3.8 litres"),
    ("Where is the Quillmere D-27 built?", "Trenholm"),
    ("What is the part number of the carbon sachet?", "CS-809"),
)
