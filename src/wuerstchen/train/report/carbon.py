"""CO2 emissions of electricity by country.

Lifecycle grams of CO2 equivalents per kWh generated in 2023: Ember and Energy Institute, processed by Our
World in Data ("Carbon intensity of electricity generation", CC BY 4.0). Countries without a figure for 2023
are left out. The world average is from Ember's Global Electricity Review 2024.
"""

SOURCE = "Ember, 2023"

WORLD_GRAMS = 480

GRAMS_PER_KWH = {
    "AR": 354, "AT": 111, "AU": 549, "BD": 691, "BE": 138, "BG": 335, "BR": 98, "CA": 170, "CH": 35,
    "CL": 291, "CN": 582, "CO": 260, "CZ": 450, "DE": 381, "DK": 152, "EE": 417, "EG": 570, "ES": 174,
    "FI": 79, "FR": 56, "GB": 238, "GR": 337, "HR": 205, "HU": 204, "IE": 291, "IN": 713, "IR": 655,
    "IT": 331, "JP": 485, "KE": 70, "KR": 431, "KZ": 821, "LT": 160, "LU": 105, "LV": 123, "MA": 630,
    "MX": 507, "NG": 523, "NL": 268, "NO": 30, "NZ": 113, "PH": 611, "PK": 441, "PL": 662, "PT": 166,
    "RO": 241, "RS": 636, "RU": 441, "SE": 41, "SG": 471, "SI": 231, "SK": 117, "TH": 550, "TR": 465,
    "TW": 642, "US": 369, "VN": 475, "ZA": 708,
}  # fmt: skip
"""By country code (ISO 3166-1 alpha-2)."""
