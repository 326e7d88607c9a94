//! The charts of a report, drawn at twice their size, because the drawing backend only supports whole pixels.

use super::ink::{self, Ink};
use super::{SANE, Timeline, time};
use crate::out::{median, quantile};
use crate::size;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Maximum number of saves drawn one by one.
pub const ROWS: usize = 12;
/// Maximum number of points of a line.
const POINTS: usize = 240;
pub const AXIS: u32 = 60;
const LETTERS: i32 = 30;

/// The size of a chart. A page has each chart in two sizes, and shows the one that fits the screen.
#[derive(Clone, Copy)]
pub struct Size {
    pub width: u32,
    /// The left margin of all charts over time, equal so that they align vertically.
    pub left: u32,
    pub right: u32,
    /// About how many labels the x axis has.
    pub labels: usize,
    /// The most letters of the name of a row.
    room: usize,
}

/// For a screen.
pub const WIDE: Size = Size { width: 1800, left: 300, right: 150, labels: 8, room: 19 };
/// For a phone.
pub const NARROW: Size = Size { width: 760, left: 180, right: 150, labels: 3, room: 11 };

pub type Drawn<T> = Result<T, DrawingAreaErrorKind<std::io::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Draws every save as a row, with a lane for each phase.
pub fn phases(saves: &[Timeline], of: Size) -> Drawn<String> {
    const LANE: f64 = 18.0;
    let rows = picked(saves);
    let names = phase_names(rows.iter().map(|row| row.save));
    let row_height = LANE * names.len() as f64 + 24.0;
    let height = row_height * rows.len() as f64;
    let end = latest(&rows);
    // A phase that is too short to see is drawn as a sliver.
    let sliver = end * 5.0 / f64::from(of.width - of.left - of.right);
    canvas(of, height as u32 + AXIS + 20, |area| {
        let mut chart = lanes(area, of, Margins { top: 10, right: of.right }, end, height)?;
        for (i, row) in rows.iter().enumerate() {
            let top = row_height * i as f64 + 12.0;
            let middle = top + LANE * names.len() as f64 / 2.0;
            chart.draw_series(row.save.phases().map(|phase| {
                let lane = names.iter().position(|name| *name == phase.name).unwrap_or(0);
                let (y, to) = (top + LANE * lane as f64, phase.to.max(phase.from + sliver).min(end));
                Rectangle::new(
                    [(phase.from.min(to - sliver), y), (to, y + LANE - 2.0)],
                    Ink::of_phase(phase.name).rgb().filled(),
                )
            }))?;
            let label = |x, offset, text: String, ink, side| {
                EmptyElement::at((x, middle)) + Text::new(text, (offset, 0), letters(ink, side, VPos::Center))
            };
            let length = row.save.length();
            chart.draw_series([
                label(0.0, -20, row.label(of.room), ink::TEXT, HPos::Right),
                label(length.min(end), 14, time(length), ink::MUTED, HPos::Left),
            ])?;
        }
        Ok(())
    })
}

/// Draws the bytes staged and written over time: the median save on top of the others.
pub fn bytes(saves: &[Timeline], of: Size) -> Drawn<String> {
    let mut rows = picked(saves);
    rows.retain(|row| row.save.samples().next().is_some());
    let end = latest(&rows);
    let most = rows.iter().flat_map(|row| row.save.samples().map(|s| s.staged.max(s.written))).max().unwrap_or(0);
    let most = most.max(1) as f64;
    // Draw the median save last, on top of the others.
    let middle = median_of(&rows);
    rows.sort_by_key(|row| Some(row.index) == middle);
    canvas(of, 620, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(20)
            .margin_right(of.right)
            .x_label_area_size(AXIS)
            .y_label_area_size(of.left)
            .build_cartesian_2d(0.0..end, 0.0..most * 1.05)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(of.labels)
            .y_labels(6)
            .x_label_formatter(&|at| moment(*at, end))
            .y_label_formatter(&|bytes| size::shown(bytes.round() as u64).replace(".0 ", " "))
            .axis_style(ink::LIMIT.rgb())
            .bold_line_style(ink::GRID.rgb())
            .light_line_style(TRANSPARENT)
            .label_style(letters(ink::MUTED, HPos::Center, VPos::Top))
            .y_label_style(letters(ink::MUTED, HPos::Right, VPos::Center))
            .draw()?;
        for row in &rows {
            let samples: Vec<_> = row.save.samples().collect();
            let step = samples.len().div_ceil(POINTS).max(1);
            let last = samples.len() - 1;
            let thinned: Vec<_> = (0..=last).filter(|i| i % step == 0 || *i == last).map(|i| samples[i]).collect();
            let bold = Some(row.index) == middle;
            let style = |ink: Ink| {
                if bold { ink.rgb().stroke_width(6) } else { ink.rgb().mix(0.3).stroke_width(2) }
            };
            let staged = thinned.iter().map(|s| (s.at, s.staged as f64));
            let written = thinned.iter().map(|s| (s.at, s.written as f64));
            if bold {
                chart.draw_series(AreaSeries::new(written.clone(), 0.0, ink::WRITING.rgb().mix(0.12)))?;
            }
            chart.draw_series(LineSeries::new(staged, style(ink::STAGING)))?;
            chart.draw_series(LineSeries::new(written, style(ink::WRITING)))?;
        }
        Ok(())
    })
}

/// Draws every ratio as a dot, ours above the machine's own noise.
pub fn ratios(ours: &[f64], noise: &[f64], of: Size) -> Drawn<String> {
    const BINS: f64 = 80.0;
    const CAPTION: u32 = 60;
    let all = || ours.iter().chain(noise).copied();
    let (low, high) = all().fold((1.0, 1.0), |(low, high): (f64, f64), r| (low.min(r), high.max(r)));
    let pad = ((high - low) * 0.05).max(0.01);
    let (low, high) = ((low - pad).max(0.0), high + pad);
    let digits = if high - low < 0.2 { 3 } else { 2 };
    let panels = [("a save \u{f7} the limit", ours, ink::WRITING), ("the limit \u{f7} the limit", noise, ink::MUTED)];
    let panels: Vec<_> = panels
        .into_iter()
        .filter(|(_, values, _)| !values.is_empty())
        .map(|(name, values, ink)| (name, values, ink, stacked(values, low, (high - low) / BINS)))
        .collect();
    // Dots are as wide as their bin, or as low as the tallest stack requires.
    let tallest = panels.iter().flat_map(|(.., dots)| dots).map(|(_, level)| level + 1).max().unwrap_or(1) as f64;
    let dot = (f64::from(of.width - of.left / 2 - of.right) / BINS).min(240.0 / tallest);
    let top = (tallest * dot + 20.0).max(110.0).round();
    let panel = top as u32 + CAPTION;
    canvas(of, panel * panels.len() as u32 + AXIS, |area| {
        let cuts: Vec<_> = (1..panels.len() as i32).map(|i| i * panel as i32).collect();
        let parts = area.split_by_breakpoints::<i32, i32, _, _>(&[], &cuts);
        for (i, ((name, values, ink, dots), part)) in panels.iter().zip(&parts).enumerate() {
            let axis = if i + 1 == panels.len() { AXIS } else { 0 };
            let mut chart = ChartBuilder::on(part)
                .margin_top(CAPTION)
                .margin_right(of.right)
                .margin_left(of.left / 2)
                .x_label_area_size(axis)
                .build_cartesian_2d(low..high, 0.0..top)?;
            let middle = median(values.iter().copied());
            let [from, to] = [0.25, 0.75].map(|q| quantile(values.iter().copied(), q));
            chart.draw_series([Rectangle::new([(from, 0.0), (to, top)], ink.rgb().mix(0.14).filled())])?;
            draw_x_axis(&mut chart, of.labels + 1, &|ratio| format!("{ratio:.digits$}"))?;
            let upright = |x, ink: Ink, width| PathElement::new([(x, 0.0), (x, top)], ink.rgb().stroke_width(width));
            chart.draw_series([upright(1.0, ink::LIMIT, 3), upright(middle, *ink, 4)])?;
            chart.draw_series(dots.iter().map(|(x, level)| {
                let y = 3.0 + dot * (*level as f64 + 0.5);
                Circle::new((*x, y), (dot / 2.0 - 1.0).clamp(2.0, 9.0) as i32, ink.rgb().mix(0.85).filled())
            }))?;
            let caption = format!("{name}: median {middle:.3}, {}", pairs(values.len()));
            part.draw(&Text::new(caption, (of.left as i32 / 2, 14), letters(ink::TEXT, HPos::Left, VPos::Top)))?;
        }
        Ok(())
    })
}

/// Returns the names of all phases, in the order of first use.
pub fn phase_names<'a>(saves: impl Iterator<Item = &'a Timeline>) -> Vec<&'static str> {
    let mut names = Vec::new();
    for phase in saves.flat_map(Timeline::phases) {
        if !names.contains(&phase.name) {
            names.push(phase.name);
        }
    }
    names
}

struct Row<'a> {
    index: usize,
    save: &'a Timeline,
    rank: &'static str,
}

impl Row<'_> {
    /// Its name, in at most `room` letters.
    fn label(&self, room: usize) -> String {
        let room = room - if self.rank.is_empty() { 0 } else { self.rank.len() + 3 };
        let short: String = self.save.label.chars().filter(|c| !c.is_control()).take(room).collect();
        if self.rank.is_empty() { short } else { format!("{} \u{b7} {short}", self.rank) }
    }
}

/// Selects all saves or, if there are many, the slowest, those around the median and the fastest.
fn picked(saves: &[Timeline]) -> Vec<Row<'_>> {
    let mut rows: Vec<Row<'_>> = saves.iter().enumerate().map(|(index, save)| Row { index, save, rank: "" }).collect();
    if rows.len() <= ROWS {
        return rows;
    }
    rows.sort_by(|a, b| b.save.length().total_cmp(&a.save.length()));
    let (n, third) = (rows.len(), ROWS / 3);
    let middle = (n - third) / 2;
    let groups = [("slow", 0), ("middle", middle), ("fast", n - third)];
    for (rank, from) in groups {
        rows[from..from + third].iter_mut().for_each(|row| row.rank = rank);
    }
    rows.retain(|row| !row.rank.is_empty());
    rows
}

/// Returns the save of median length.
fn median_of(rows: &[Row<'_>]) -> Option<usize> {
    let mut sorted: Vec<_> = rows.iter().map(|row| (row.save.length(), row.index)).collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    sorted.get(sorted.len().saturating_sub(1) / 2).map(|(_, index)| *index)
}

fn latest(rows: &[Row<'_>]) -> f64 {
    let end = rows.iter().map(|row| row.save.length()).fold(0.0, f64::max);
    if end > 0.0 { end.min(SANE) } else { 1.0 }
}

/// Returns the centre of each value's bin, and how many smaller values are in that bin.
fn stacked(values: &[f64], low: f64, bin: f64) -> Vec<(f64, usize)> {
    let mut heights = std::collections::BTreeMap::new();
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut place = |value: f64| {
        let index = ((value - low) / bin).floor() as i64;
        let height: &mut usize = heights.entry(index).or_default();
        *height += 1;
        (low + (index as f64 + 0.5) * bin, *height - 1)
    };
    sorted.into_iter().map(&mut place).collect()
}

fn pairs(n: usize) -> String {
    if n == 1 { "1 pair".to_owned() } else { format!("{n} pairs") }
}

/// Formats a time on an axis that ends at `end`, in one unit for the whole axis.
pub fn moment(at: f64, end: f64) -> String {
    let (scale, unit) = if end < 1e-3 {
        (1e6, "\u{b5}s")
    } else if end < 1.0 {
        (1e3, "ms")
    } else {
        (1.0, "s")
    };
    let digits = if end * scale < 10.0 { 1 } else { 0 };
    format!("{:.digits$} {unit}", at * scale)
}

pub fn letters(ink: Ink, side: HPos, height: VPos) -> TextStyle<'static> {
    let font = ("sans-serif", LETTERS).into_font();
    TextStyle { font, color: ink.rgb().to_backend_color(), pos: Pos::new(side, height) }
}

/// The space between a chart and the edge of its area, in pixels.
pub struct Margins {
    pub top: u32,
    pub right: u32,
}

/// Returns a chart of horizontal lanes over a time axis of `end` seconds; its y grows downwards to `height`.
pub fn lanes<'a, 'b>(area: &'a Area<'b>, of: Size, margins: Margins, end: f64, height: f64) -> Drawn<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .margin_top(margins.top)
        .margin_right(margins.right)
        .x_label_area_size(AXIS)
        .y_label_area_size(of.left)
        .build_cartesian_2d(0.0..end, height..0.0)?;
    draw_x_axis(&mut chart, of.labels, &|at| moment(*at, end))?;
    Ok(chart)
}

/// Draws the x axis with its labels and vertical lines.
fn draw_x_axis(chart: &mut Chart<'_, '_>, labels: usize, format: &dyn Fn(&f64) -> String) -> Drawn<()> {
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_labels(labels)
        .x_label_formatter(&format)
        .axis_style(ink::LIMIT.rgb())
        .bold_line_style(ink::GRID.rgb())
        .light_line_style(TRANSPARENT)
        .label_style(letters(ink::MUTED, HPos::Center, VPos::Top))
        .draw()
}

/// Draws an area, and gives the picture the shape of it instead of its size.
pub fn canvas(of: Size, height: u32, draw: impl FnOnce(&Area<'_>) -> Drawn<()>) -> Drawn<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (of.width, height)).into_drawing_area();
    draw(&area)?;
    area.present()?;
    drop(area);
    Ok(svg)
}
