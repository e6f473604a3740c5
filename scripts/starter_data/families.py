"""Families of molecules: SMILES, templates with places of substituents, and patterns of unstable molecules."""

DIATOMIC = """
    [H][H] N#N [C-]#[O+] F Cl FF ClCl FCl Br BrBr
""".split()

INORGANIC = """
    O N S P C OO NN NO SS O=C=O S=C=S O=C=S [N-]=[N+]=O O=S=O O=S(=O)=O OS(=O)(=O)O O[N+](=O)[O-]
    ON=O OP(=O)(O)O OP(O)O [H]N=N[H] N=[N+]=[N-] FC(F)(F)F ClC(Cl)(Cl)Cl FP(F)F ClP(Cl)Cl
    FS(F)(F)(F)(F)F O=S(Cl)Cl O=P(Cl)(Cl)Cl FN(F)F FOF ClOCl OCl NCl ClSCl ClN(Cl)Cl ON C#N OC#N
    N=C=O N=C=S
""".split()

# Substituents, as branches of SMILES. Their ring numbers are 8 and 9; templates use lower ones.
ALKYL = """
    (C) (CC) (C(C)C) (C(C)(C)C) (C=C) (C#C) (C8CC8)
""".split()
POLAR = """
    (O) (OC) (N) (NC) (N(C)C) (CO) (CN) (C=O) (C(=O)C) (C(=O)O) (C(=O)OC) (C(=O)N) (NC(=O)C) (C#N)
    ([N+](=O)[O-]) (CC(=O)O) (C=NO) (N=C=O) (OC(=O)C)
""".split()
HALOGEN_SULFUR = """
    (F) (Cl) (C(F)(F)F) (CCl) (CF) (S) (SC) (CS) (S(=O)C) (S(=O)(=O)C) (S(=O)(=O)N) (C(=O)Cl)
    (C(=S)N) (S(=O)(=O)F) (OC(F)F)
""".split()
RARE = """
    (Br) (CBr) (P) (P(C)C) (P(=O)(O)O) (OP(=O)(O)O)
""".split()
RINGS = """
    (c9ccccc9) (Cc9ccccc9) (c9ccco9) (c9cccs9) (C9CCCCC9) (N9CCOCC9) (c9ccncc9)
""".split()
SIDE_CHAINS = """
    (C) (C(C)C) (CC(C)C) (C(C)CC) (CO) (C(C)O) (CS) (CCSC) (CC(=O)N) (CCC(=O)N) (CC(=O)O) (CCC(=O)O)
    (CCCCN) (CCCNC(=N)N) (Cc9ccccc9) (Cc9c[nH]cn9) (Cc9ccc(O)cc9) (CCl) (CF) (O) (CC) (CCC) (OC)
""".split()

NO_SUBSTITUENT = ""
USUAL = [NO_SUBSTITUENT, *ALKYL, *POLAR, *HALOGEN_SULFUR]

# Templates and substituents of each family. "{a}" and "{b}" are the places of substituents.
TEMPLATES = {
    "aromatic": (
        """
            c1ccccc1{a} c1ccc{a}cc1{b} c1cc{a}ccc1{b} c1cccc{a}c1{b} c1ccc2c{a}cccc2c1
            c1cc{a}c{b}cc1C
        """.split(),
        [*USUAL, *RARE, *RINGS],
    ),
    "heteroaromatic": (
        """
            n1ccc{a}cc1{b} n1cc{a}ccc1{b} c1c{a}cc{b}o1 c1c{a}cc{b}s1 c1c{a}cc{b}[nH]1 n1c{a}cn{b}c1
            n1cc{a}c{b}n1C o1cnc{a}c1{b} s1cnc{a}c1{b} n1cnc{a}cc1{b} n1ccnc{a}c1{b} n1nc{a}oc1{b}
            n1nnc{a}n1{b} c1c{a}c2ccccc2[nH]1 n1cn{a}c2cncnc12 o1nc{a}cc1{b} c1c{a}c2ccccc2o1
            O=c1cc{a}[nH]c(=O)[nH]1 Nc1cc{a}[nH]c(=O)n1 Nc1ncnc2c1ncn2{a} O=c1cc{a}occ1{b}
        """.split(),
        [*USUAL, *RARE],
    ),
    "aliphatic-ring": (
        """
            C1CC1{a}{b} C1CC{a}C1{b} C1CCC{a}C1{b} C1CCC{a}CC1{b} O1CC{a}C1{b} O1CCC{a}C1{b}
            N1{a}CCCC1{b} N1{a}CCCCC1{b} O1CCN{a}CC1{b} S1CCC{a}C1{b} C1=CC{a}CC1{b} C1=CC{a}CCC1{b}
            O=C1CCC{a}C1{b} O=C1CCC{a}CC1 O=C1NCC{a}C1{b} O=C1OCC{a}C1{b} C1C2CC{a}C1CC2 O1CC1{a}{b}
            N1{a}CC1{b} S1CC1{a}{b} C1CSSC1{a} O1COC{a}C1{b} O1CCOC{a}C1{b} C1NC{a}CNC1{b}
        """.split(),
        [*USUAL, *RARE],
    ),
    "chain": (
        """
            C{a}C{b} CC{a}C{b} C{a}CC{b} C{a}CCC{b} C{a}CCCC{b} CC{a}CC{b}C C{a}=C{b} CC{a}=C{b}
            C{a}C=CC{b} C{a}#C{b} C{a}C#CC{b} C{a}=CC=C{b} CC(C)C{a}C{b} CC(C)(C)C{a} C{a}=C=C{b}
        """.split(),
        [*USUAL, *RARE, *RINGS],
    ),
    "heteroatom-chain": (
        """
            C{a}OC{b} C{a}NC{b} C{a}N(C)C{b} C{a}SC{b} C{a}SSC{b} C{a}OOC{b} C{a}S(=O)C{b}
            C{a}S(=O)(=O)C{b} C{a}OCOC{b} C{a}NN(C)C{b} C{a}ON=C{b} C{a}N=C{b} C{a}N=NC{b}
            C{a}OCCOC{b} C{a}S(=O)(=O)N{b} CC{a}OC{b}C C{a}ON(C)C{b} C{a}OP(=O)(OC)C{b}
        """.split(),
        USUAL,
    ),
    "carbonyl": (
        """
            C{a}C(=O)C{b} C{a}C(=O)OC{b} C{a}C(=O)NC{b} C{a}C(=O)N(C)C{b} C{a}C(=O)O C{a}C(=O)N
            C{a}C=O N{a}C(=O)N{b} N{a}C(=S)N{b} C{a}OC(=O)OC{b} C{a}OC(=O)NC{b} C{a}C(=O)SC{b}
            C{a}C(=O)OC(=O)C{b} C{a}C(=O)C(=O)C{b} C{a}C(=O)CC(=O)C{b} C=C{a}C(=O)C{b} O=CC{a}C=O
            C{a}C(=O)CC{b} OC(=O)C{a}C(=O)O C{a}C(=N)N{b} C{a}C(=O)NN{b} C{a}C(=O)NO NC(=N)N{a}C
        """.split(),
        USUAL,
    ),
    "biomolecule": (
        """
            NC{a}C(=O)O CC(=O)NC{a}C(=O)O CC(=O)NC{a}C(=O)N CC(=O)NC{a}C(=O)NC NCC(=O)NC{a}C(=O)O
            NC{a}C(=O)NCC(=O)O NC{a}C(=O)OC OCC(O)C{a}=O OCC(O)C(O)C{a}=O OC1COC{a}C1O OCC(=O)C{a}O
        """.split(),
        [NO_SUBSTITUENT, *SIDE_CHAINS],
    ),
}

# SMARTS of molecules that fall apart or that a semi-empirical method describes badly.
UNSTABLE = [
    "[N,O,S;!+]~[N,O,SX2;!+]~[N,O,S;!+]",  # chain of three heteroatoms, neither aromatic nor a sulfone
    "[O,S;D1]=[O,S;D1]",  # O2, SO and S2 are triplets
    "[F,Cl,Br]~[#7,#8,SX2]",
    "[R]#[R]",
    "[R]=[R]=*",
    "*=[r3]=*",
    "[r3]=[r3]",
    "[a;r3]",  # the same, where RDKit regards the ring as aromatic
    "[r4]=[r4]-[r4]=[r4]",
    "[r3](~[r3])(~[r3])~[r3]",
    "C=C=C=C",
]
