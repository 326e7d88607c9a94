//! Modules: the entry points that a PTX text declares, and the sizes of their parameters.

use crate::abi::{INVALID_PTX, Status};
use std::collections::BTreeMap;

/// Maps each entry point to the size of its parameters in bytes.
pub type Module = BTreeMap<String, usize>;

/// Parses the `.entry` declarations of a PTX text, and nothing else in it.
pub fn parse(ptx: &str) -> Status<Module> {
    if !ptx.contains(".version") || !ptx.contains(".target") {
        return Err(INVALID_PTX);
    }
    let mut module = Module::new();
    for entry in ptx.split(".entry").skip(1) {
        let (name, rest) = entry.split_once('(').ok_or(INVALID_PTX)?;
        let (parameters, _) = rest.split_once(')').ok_or(INVALID_PTX)?;
        let bytes = parameters.split(',').map(size).sum::<Option<usize>>().ok_or(INVALID_PTX)?;
        module.insert(name.trim().to_owned(), bytes);
    }
    if module.is_empty() { Err(INVALID_PTX) } else { Ok(module) }
}

/// Size of one `.param` in bytes: `.u64 name`, or `.align 8 .b8 name[40]`.
fn size(parameter: &str) -> Option<usize> {
    if parameter.trim().is_empty() {
        return Some(0);
    }
    let kind = parameter.split_whitespace().rev().nth(1)?;
    let element = kind.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().ok()? / 8;
    let count = parameter.split_once('[').and_then(|(_, n)| n.trim_end().strip_suffix(']'));
    Some(element * count.map_or(Some(1), |n| n.parse().ok())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_the_size_of_their_parameters() {
        let ptx = ".version 8.4\n.target sm_80\n.address_size 64\n.visible .entry one(\n\t.param .align 8 .b8 one_param_0[40]\n)\n\
            {\n}\n.visible .entry two(.param .u64 two_param_0, .param .f32 two_param_1)\n.entry three()";
        let module = parse(ptx).unwrap();
        let sizes: Vec<_> = module.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        assert_eq!(sizes, [("one", 40), ("three", 0), ("two", 12)]);
        assert_eq!(parse("\u{7f}ELF"), Err(INVALID_PTX));
    }
}
