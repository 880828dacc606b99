# The code for GPUs, part of fourmoe_core: each room's sources for its machines, all others for every room's. CUDA's
# runtime is linked statically, so that the library loads on machines without CUDA and without a driver.
set(CMAKE_CUDA_ARCHITECTURES 90a-real)  # before the language, whose checks would pick one that nvcc may lack
enable_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  message(FATAL_ERROR "FOURMOE_CUDA=ON needs nvcc 12.8 or newer, found ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)  # CMake 3.25 does not know nvcc 13
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_FLAGS_RELWITHDEBINFO "-O3 -lineinfo -DNDEBUG")
find_package(CUDAToolkit REQUIRED)

# Objects of a room's sources.
function(fourmoe_compile_cuda name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}" CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${name} PRIVATE FOURMOE_CUDA)
  target_compile_options(${name} PRIVATE --expt-relaxed-constexpr -Werror all-warnings)
endfunction()

# Likewise, in the core.
function(fourmoe_add_cuda name architectures)
  if(ARGN)
    fourmoe_compile_cuda(${name} "${architectures}" ${ARGN})
    target_sources(fourmoe_core PRIVATE $<TARGET_OBJECTS:${name}>)
  endif()
endfunction()

file(GLOB_RECURSE FOURMOE_CUDA_SOURCES CONFIGURE_DEPENDS src/*.cu)
set(shared ${FOURMOE_CUDA_SOURCES})
set(all_architectures)
foreach(room sm90:90a-real)  # room:its machines
  string(REPLACE ":" ";" room "${room}")
  list(POP_FRONT room folder)
  set(sources ${FOURMOE_CUDA_SOURCES})
  list(FILTER sources INCLUDE REGEX "/src/backends/${folder}/")
  list(FILTER shared EXCLUDE REGEX "/src/backends/${folder}/")
  fourmoe_add_cuda(fourmoe_${folder} "${room}" ${sources})
  list(APPEND all_architectures ${room})
endforeach()
fourmoe_add_cuda(fourmoe_gpu "${all_architectures}" ${shared})

target_compile_definitions(fourmoe_core PUBLIC FOURMOE_CUDA)
target_link_libraries(fourmoe_core PUBLIC CUDA::cudart_static)

# Programs that measure, built when named: the two GEMMs alone, route and combine alone.
foreach(program gemms:bench/sm90/gemms.cu route:bench/gpu/route.cu)
  string(REPLACE ":" ";" program "${program}")
  list(POP_FRONT program name)
  add_executable(fourmoe_bench_${name} EXCLUDE_FROM_ALL ${program})
  target_include_directories(fourmoe_bench_${name} PRIVATE tests)
  target_compile_options(fourmoe_bench_${name} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>")
  target_link_libraries(fourmoe_bench_${name} PRIVATE fourmoe_core)
endforeach()
