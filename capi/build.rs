//! Links the shared library with the name that its ABI has, and so that it is never unloaded: its threads and
//! its fork handler outlive a dlclose(3).

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libashore.so.1");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // The checksums' crate has C functions of its own, which a program must not find in this library.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    println!("cargo:rerun-if-changed=build.rs");
}
