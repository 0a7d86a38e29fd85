"""Plain English, code and other languages, for calibration when a user gives no data. Written for narrowcast."""

PASSAGES = [
    "The morning train was late again, and the platform filled with people who had stopped pretending to be patient. "
    "A woman read the same page of her newspaper three times; a boy counted the tiles between the benches.",
    "To bake the bread, mix the flour, the salt and the water, and let the dough rest until it has doubled in size. "
    "Shape it gently, dust it with flour, and put it into a very hot oven with a cup of water beside it.",
    "def moving_average(values, width):\n    total = 0.0\n    result = []\n    for i, value in enumerate(values):\n"
    "        total += value\n        if i >= width:\n            total -= values[i - width]\n"
    "        result.append(total / min(i + 1, width))\n    return result\n",
    "Water expands when it freezes, which is why ice floats and why pipes burst in winter. Few other liquids do this, "
    "and life in cold lakes depends on it: the ice on top keeps the water below from freezing.",
    "Could you send me the figures for the third quarter before noon? The board meets at two, and I would like to check "
    "them against last year's report. If anything is missing, a rough estimate will do for now.",
    "El mercado abre a las ocho. Los vendedores llegan antes del amanecer con cajas de fruta y pescado, y discuten el "
    "precio del café mientras esperan a los primeros clientes.",
    "SELECT c.name, SUM(o.total) AS spent FROM customers c JOIN orders o ON o.customer_id = c.id "
    "WHERE o.created >= '2024-01-01' GROUP BY c.name ORDER BY spent DESC LIMIT 10;",
    "The committee agreed that the bridge should be repaired rather than replaced. The stone piers are sound; only the "
    "deck, which was added a century later, has begun to fail where the rain gets in.",
    "Question: A farmer has 17 sheep and buys 8 more, then sells 6. How many are left? Answer: 17 + 8 = 25, and 25 - 6 "
    "= 19, so the farmer has 19 sheep left.",
    "She closed the door quietly, waited until the footsteps had gone, and only then opened the letter. It was shorter "
    "than she had expected, and it said nothing that she did not already know.",
]
