//! `ashore completions` and `ashore man`: descriptions of this program for shells and for `man`.

use crate::{Cli, out};
use ashore::{Error, Result};
use clap::{Command, CommandFactory};
use std::process::ExitCode;

/// The flags of `completions`.
#[derive(clap::Args)]
pub struct Args {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: clap_complete::Shell,
}

/// Prints completions of a shell.
pub fn completions(args: &Args) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ashore", &mut text);
    print(&text)
}

/// Prints a page of the manual, with all verbs in it.
pub fn man() -> Result<ExitCode> {
    let mut command = Cli::command();
    command.build();
    let mut text = Vec::new();
    let failed = |e| Error::io("cannot write the manual", e);
    clap_mangen::Man::new(command.clone()).render(&mut text).map_err(failed)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        section(verb, &mut text).map_err(failed)?;
    }
    print(&text)
}

/// Writes the synopsis and the options of a verb, without a page header.
fn section(verb: &Command, text: &mut Vec<u8>) -> std::io::Result<()> {
    let page = clap_mangen::Man::new(verb.clone());
    text.extend_from_slice(format!("\n.SH \"ASHORE {}\"\n", verb.get_name().to_uppercase()).as_bytes());
    let mut part = Vec::new();
    page.render_description_section(&mut part)?;
    page.render_synopsis_section(&mut part)?;
    page.render_options_section(&mut part)?;
    // The sections of the verb are parts of this page.
    let part = String::from_utf8_lossy(&part).replace("\n.SH ", "\n.SS ");
    text.extend_from_slice(part.strip_prefix(".SH ").map_or(part.clone(), |rest| format!(".SS {rest}")).as_bytes());
    Ok(())
}

fn print(text: &[u8]) -> Result<ExitCode> {
    out::print(&String::from_utf8_lossy(text))?;
    Ok(ExitCode::SUCCESS)
}
