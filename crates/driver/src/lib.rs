//! What a site's driver does, as a trait, with a memory double and the suite every driver passes.
