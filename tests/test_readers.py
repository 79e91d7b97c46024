"""What all readers share: the names of genes."""

from section_reading import named_gene


def test_the_stated_mapping_of_names():
    assert named_gene("ENSG00000087460.24") == ("ENSG00000087460", "", "ENSG00000087460")
    assert named_gene("GNAS", ensembl="ENSG00000087460.24") == ("ENSG00000087460", "GNAS", "ENSG00000087460")
    assert named_gene("Gnas", "ENSMUSG00000027523") == ("ENSMUSG00000027523", "Gnas", "ENSMUSG00000027523")
    assert named_gene("Gnas") == ("Gnas", "Gnas", "")
    assert named_gene("GNAS", ensembl="2778") == ("GNAS", "GNAS", "")
