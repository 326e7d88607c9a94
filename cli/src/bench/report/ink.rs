//! The colours of a report. Charts use the light ones, and the style sheet replaces them on a dark screen.

use plotters::style::RGBColor;

/// One colour, for light and dark backgrounds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ink {
    name: &'static str,
    light: (u8, u8, u8),
    dark: &'static str,
}

pub const TEXT: Ink = Ink { name: "text", light: (0x1b, 0x26, 0x31), dark: "#e8eef4" };
pub const MUTED: Ink = Ink { name: "muted", light: (0x5a, 0x68, 0x77), dark: "#93a4b5" };
pub const GRID: Ink = Ink { name: "grid", light: (0xdf, 0xe4, 0xea), dark: "#2b3743" };
pub const LIMIT: Ink = Ink { name: "limit", light: (0x9a, 0xa7, 0xb4), dark: "#6b7d8f" };
pub const CALL: Ink = Ink { name: "call", light: (0xd0, 0x33, 0x4d), dark: "#ff7185" };
pub const STAGING: Ink = Ink { name: "staging", light: (0xe0, 0x96, 0x1f), dark: "#f4b74f" };
pub const WRITING: Ink = Ink { name: "writing", light: (0x1f, 0x6f, 0xb2), dark: "#5eaef0" };
pub const COMMIT: Ink = Ink { name: "commit", light: (0x2c, 0x8c, 0x6a), dark: "#58c79e" };
pub const OTHER: Ink = Ink { name: "other", light: (0x7b, 0x58, 0xa8), dark: "#b798e3" };

const ALL: [Ink; 9] = [TEXT, MUTED, GRID, LIMIT, CALL, STAGING, WRITING, COMMIT, OTHER];

impl Ink {
    /// Returns the colour of a phase, the same everywhere.
    pub fn of_phase(name: &str) -> Self {
        [("save call", CALL), ("staging", STAGING), ("writing", WRITING), ("commit", COMMIT)]
            .into_iter()
            .find_map(|(known, ink)| (known == name).then_some(ink))
            .unwrap_or(OTHER)
    }

    /// Returns the colour for charts.
    pub fn rgb(self) -> RGBColor {
        let (r, g, b) = self.light;
        RGBColor(r, g, b)
    }

    /// Returns the colour for a style attribute.
    pub fn var(self) -> String {
        format!("var(--{})", self.name)
    }

    /// Returns the colour as the drawing backend writes it.
    fn hex(self) -> String {
        let (r, g, b) = self.light;
        format!("#{r:02X}{g:02X}{b:02X}")
    }
}

/// Returns the style rules that name every colour and replace it on a dark screen. Printed pages stay light.
pub fn rules() -> String {
    let light: String = ALL.iter().map(|ink| format!("--{}:{};", ink.name, ink.hex())).collect();
    let dark: String = ALL.iter().map(|ink| format!("--{}:{};", ink.name, ink.dark)).collect();
    let charts = ALL.iter().flat_map(|ink| {
        ["fill", "stroke"].map(|part| format!("svg [{part}=\"{}\"]{{{part}:{}}}\n", ink.hex(), ink.var()))
    });
    let charts: String = charts.collect();
    format!(":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{charts}")
}
